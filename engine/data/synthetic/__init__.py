"""A data set drawn from scratch, with an oracle that reads its images, for the demo and for tests."""
