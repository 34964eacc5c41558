"""Communication-efficient split learning on Flower."""
