"""What `make run` and the tests need and production never has."""
