"""Does every variant still compute the same function? Inputs, judgement, and the run that joins them."""
