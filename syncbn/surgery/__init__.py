"""Changes to the layers of a model: conversion and its reversal, freezing, fused activations, folding for inference."""
