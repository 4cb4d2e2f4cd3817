"""The command. The code is in pipeline.py, because other processes must be able to import its functions."""

from benchmarks.highway.pipeline import main

if __name__ == "__main__":
    main()
