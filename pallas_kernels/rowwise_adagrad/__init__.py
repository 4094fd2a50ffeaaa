"""Row-wise AdaGrad of the rows that a batch looked up."""
