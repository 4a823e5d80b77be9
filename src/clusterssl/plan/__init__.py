"""What a training will need, before it is submitted: memory, network, disk and time."""
