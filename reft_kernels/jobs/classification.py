"""placeholder"""


class ClassificationJob:
    pass
