"""What is checked before and after a run: operators, rewards, and the metrics of samples."""
