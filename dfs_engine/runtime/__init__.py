"""What runs where: backends and the choice among kernels, what is known of the machine, memory, optional packages."""
