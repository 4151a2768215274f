"""Episodes in order, loaded ahead, whose masks may follow the losses."""
