"""Run at the start of each Python process whose PYTHONPATH contains this folder: nnU-Net then uses one thread on a CPU.

Several processes with as many threads as cores would slow each other down.
"""

import multiprocessing

multiprocessing.cpu_count = lambda: 1
