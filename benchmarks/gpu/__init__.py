"""What only a CUDA GPU can tell: probes of the driver, and the report of what a save costs there.

python -m benchmarks.gpu probe --out DIRECTORY
python -m benchmarks.gpu report --out DIRECTORY
python -m benchmarks.gpu render
"""
