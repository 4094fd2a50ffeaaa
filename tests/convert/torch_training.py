"""A few steps of plain PyTorch on the small data set."""

import small
import torch


def trained(model, steps=100):
  """`model` in evaluation mode after so many steps of Adam."""
  torch.manual_seed(0)
  optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
  cols = small.columns(64 * steps, 7)
  for i in range(steps):
    part = slice(64 * i, 64 * (i + 1))
    label = torch.from_numpy(cols["label"][part])[:, 0].float()
    logits = model(*inputs({name: column[part] for name, column in cols.items()}))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
  return model.eval()


def inputs(cols):
  """(dense, ids) of columns."""
  return torch.from_numpy(cols["dense"]), torch.from_numpy(cols["ids"]).long()


def logits_of_test(model):
  """Of the data's split `test`, in its order."""
  with torch.no_grad():
    return model(*inputs(small.columns(small.EXAMPLES["test"], 2))).numpy()
