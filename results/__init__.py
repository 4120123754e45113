"""Published records and weights, and the scripts that publish runs and write the tables."""
