"""Start-up of the processes, what the engine gets, what ranks agree on, and how they stop or fail."""
