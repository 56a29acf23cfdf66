"""Many pictures: inputs, decoding processes, batches, the output that a run can go on with."""
