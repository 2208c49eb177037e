"""What calibration inputs tell: moments, Fisher information, BatchNorm statistics."""
