"""What the compiler says of a program for GPUs that are not here. Importing it loads no JAX."""
