"""Everything that can be learnt in the few minutes in which a machine with a GPU is there: benchmarks/gpu.md.

    python -m benchmarks.gpu --out DIR [--cifar PICTURES ...] [--parts NAME ...] [--commit NAME]
    python -m benchmarks.gpu --out DIR --rehearse
    python -m benchmarks.gpu --pack-cifar SOURCE OUT --half 1
    python -m benchmarks.gpu --draw DIR/gpu.jsonl FOLDER

The first one needs no network and writes nothing outside DIR. Its parts, in this order, each in a process of its own
and with a time limit of its own: doctor, tests, inference, compiled, training, cifar, cores. DIR/gpu.jsonl has a line
for every row as it is measured and one for every part as it ends; DIR/log.txt what the parts printed. --rehearse does
all of it in tiny on a CPU.
"""
