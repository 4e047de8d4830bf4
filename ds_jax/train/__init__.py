"""The two-stage schedule: supernet, calibration, gate."""
