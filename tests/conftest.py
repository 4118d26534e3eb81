import torch

torch.set_num_threads(1)  # the models are tiny, and the machine's other core has work of its own
