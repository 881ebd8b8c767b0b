"""What only a GPU runs, on a machine without one: no tensor on two devices, no wait of the host that is not meant."""
