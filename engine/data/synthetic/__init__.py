"""A data set drawn from scratch, with an oracle that reads its pictures, for the demo and for tests."""
