"""Guidance: denoisers made from denoisers."""

from ebbflow.guidance.classifier_free import ClassifierFree as ClassifierFree
