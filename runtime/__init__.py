"""What does happen: checkpoints, memory, devices and the executor that runs a plan's task graph."""
