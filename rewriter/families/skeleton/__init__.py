"""CUR (generalised Nyström) approximation of exp: exponentials of landmarks as features."""
