"""What trainers of other packages need to train captured models; each module here imports one of them."""
