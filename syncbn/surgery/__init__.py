"""Changing the layers of a model: conversion and its reversal, fused activations, folding for inference."""
