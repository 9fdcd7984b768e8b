"""What people read: reports, samples, measurements, figures."""
