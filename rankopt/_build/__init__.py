"""Plan to model and back: chains put in place, compared with the original, folded."""
