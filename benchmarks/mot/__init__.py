"""Three stages of training against end to end, on sequences whose class decides which signal tells the answer.

__main__.py   the command
model.py      the data, the one-layer model, and the training of one run
arms.py       what is compared, and on which data
page.py       the page of results, pure
picture.py    the losses against the steps, on a log axis
"""
