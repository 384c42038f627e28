"""One sharpness-aware optimizer step, independent of method and engine."""
