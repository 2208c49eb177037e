"""From a trained network to a smaller, fine-tuned, verified file in one call, on real digits.

Needs the extras: pip install 'rankopt[demo,train]'
"""

from __future__ import annotations

from torch.utils.data import DataLoader, TensorDataset

import rankopt
from rankopt._commands import demo

x, y, test_x, test_y = demo.load_digits()
model = demo.DigitsNet(width=8)
demo.train(model, x, y, epochs=4)

result = rankopt.compress(
    model,
    "macs<=30%",
    train=DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True),
    evaluate=lambda network: demo.accuracy(network, test_x, test_y),
    recover={"seconds": 1},
    finetune={"epochs": 3, "learning_rate": 2e-3},
    output="digits.safetensors",
)
print(result)
