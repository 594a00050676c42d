"""What an intervention costs: the default arms of one increment beside forward passes over the same probe samples.

    python -m tests.benchmarks.intervention [--rounds 5] [--threads 1]

The model of :mod:`tests.benchmarks.gram` (a Llama of 6 layers, 512 wide, LoRA of rank 16 on all linear layers),
64 sequences of 64 tokens in batches of 8, in 32 groups. Each round takes one forward pass over all samples, K and b,
and the intervention, in turns; a line is the ratio to the forward pass, median and range. Then the memory of the arms of one
fold, in adapters of rank r.
