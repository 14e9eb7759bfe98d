"""The real driver against engines, scorers and a learner that only wait: `covey simulate`."""
