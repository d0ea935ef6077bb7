"""What would happen: model sizes, plans, task graphs, the discrete-event engine and what is read from it."""
