"""Train on point clouds: python -m point_clouds.train CONFIG --data_path DIR --output_dir DIR"""

from point_clouds.run import main

if __name__ == "__main__":
    main("train")
