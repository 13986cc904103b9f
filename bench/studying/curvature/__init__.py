"""How D and the Hessian compare along trainings."""
