"""Training steps of several processes: the processes, the arms, their checks, traffic and times, and a prediction."""
