"""What the recipes share: arguments, data, metrics, and what happens before and after training."""
