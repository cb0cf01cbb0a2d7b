"""Bottom layer: plain data about a VM, its errors, and the reader of vm.yaml."""
