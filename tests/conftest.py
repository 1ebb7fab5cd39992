"Tests run on one thread each: two OpenMP threads beside any other load run many times slower than one."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
