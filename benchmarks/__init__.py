"""What the library costs, beside its peers. Each module is a command: python -m benchmarks.layer"""
