"""Reading and writing of files, independent of their content.

folder.py   the names in a data set's folder, and a lock on it
inputs.py   the inputs of a command: NAME=PATH, paths, URLs and patterns
remote.py   files on any file system of fsspec, read as streams
command.py  exit status and messages of a command that writes a data set
atomic.py   atomic writes of files
files.py    positioned reads from many files, with few of them open
walk.py     files of a folder in a fixed order, each real folder once
bad.py      unusable records and files: what is wrong, where, and how to fix it
reader.py   ids -> batches, on threads that live as long as the run
"""
