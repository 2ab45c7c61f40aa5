"""Set-up of all tests."""

import torch

# small networks gain little from a second thread, and on a busy machine they wait for it
torch.set_num_threads(1)
