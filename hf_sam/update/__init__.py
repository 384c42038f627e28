"""One sharpness-aware step, whatever the method."""
