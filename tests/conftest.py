"""What every process of the tests begins with."""

import torch

# torch starts the threads of its backward passes in the first one, for all devices that it then knows of. An ONNX
# export makes one known that needs threads, and a process that has them cannot be forked into ranks any more.
torch.ones((), requires_grad=True).backward()
