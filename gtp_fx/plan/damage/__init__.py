"""What is lost when tokens leave: `tables` holds it, `prior` guesses it, `calibration` measures it, `refinement` improves on it."""
