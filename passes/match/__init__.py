"""From anchors outwards: an attention site, or the reason why there is none."""
