"""Problems of least squares, and methods that solve them."""
