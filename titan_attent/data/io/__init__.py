"""Reading and writing of files, whatever they hold.

folder.py   the names in a data set's folder, and a lock on it
inputs.py   inputs as a command is given them
command.py  how a command that writes a data set ends
atomic.py   files that are whole under their name, or not there
files.py    positioned reads from many files, of which few are open
walk.py     files of a folder in a fixed order, each real folder once
bad.py      what cannot be used: why, where, and how to fix it
reader.py   ids -> batches, on threads that live as long as the run
"""
