"""What is studied: the recurrent model, its tied unroll, its checkpoints and its cost."""
