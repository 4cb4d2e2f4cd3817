"""The command: pipeline.py, which has a name of its own because its functions are called in other processes."""

from benchmarks.highway.pipeline import main

if __name__ == "__main__":
    main()
