"""Label names as public datasets write them, each from the dataset's own documentation or label files (facts).

Sources: TotalSegmentator's class map (v2, `total`); each challenge's page and dataset.json; 3D-IRCADb-01's folders.
"""

from __future__ import annotations

TOTALSEGMENTATOR = """
spleen kidney_right kidney_left gallbladder liver stomach pancreas adrenal_gland_right adrenal_gland_left
lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right esophagus
trachea thyroid_gland small_bowel duodenum colon urinary_bladder prostate kidney_cyst_left kidney_cyst_right sacrum
vertebrae_S1 vertebrae_L5 vertebrae_L4 vertebrae_L3 vertebrae_L2 vertebrae_L1 vertebrae_T12 vertebrae_T11 vertebrae_T10
vertebrae_T9 vertebrae_T8 vertebrae_T7 vertebrae_T6 vertebrae_T5 vertebrae_T4 vertebrae_T3 vertebrae_T2 vertebrae_T1
vertebrae_C7 vertebrae_C6 vertebrae_C5 vertebrae_C4 vertebrae_C3 vertebrae_C2 vertebrae_C1 heart aorta pulmonary_vein
brachiocephalic_trunk subclavian_artery_right subclavian_artery_left common_carotid_artery_right
common_carotid_artery_left brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left
superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein iliac_artery_left iliac_artery_right
iliac_vena_left iliac_vena_right humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right
femur_left femur_right hip_left hip_right spinal_cord gluteus_maximus_left gluteus_maximus_right gluteus_medius_left
gluteus_medius_right gluteus_minimus_left gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left
iliopsoas_right brain skull rib_left_1 rib_left_2 rib_left_3 rib_left_4 rib_left_5 rib_left_6 rib_left_7 rib_left_8
rib_left_9 rib_left_10 rib_left_11 rib_left_12 rib_right_1 rib_right_2 rib_right_3 rib_right_4 rib_right_5 rib_right_6
rib_right_7 rib_right_8 rib_right_9 rib_right_10 rib_right_11 rib_right_12 sternum costal_cartilages
""".split()

DATASETS: dict[str, list[str]] = {
    "WORD": "liver spleen left_kidney right_kidney stomach gallbladder esophagus pancreas duodenum colon intestine "
    "adrenal rectum bladder Head_of_femur_L Head_of_femur_R".split(),
    "AbdomenCT-1K": ["liver", "kidney", "spleen", "pancreas"],
    "AMOS22": ["spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota",
               "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder",
               "prostate/uterus"],
    "BTCV": ["spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
             "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland",
             "left adrenal gland"],
    "tables of papers on BTCV and FLARE22": "rkid lkid gall eso sto rad PVSV RK LK RAG LAG".split(),
    "FLARE22": ["Liver", "Right kidney", "Spleen", "Pancreas", "Aorta", "Inferior vena cava", "Right adrenal gland",
                "Left adrenal gland", "Gallbladder", "Esophagus", "Stomach", "Duodenum", "Left kidney"],
    "CT-ORG": ["Liver", "Bladder", "Lungs", "Kidneys", "Bone", "Brain"],
    "CHAOS": ["liver", "right kidney", "left kidney", "spleen"],
    "3D-IRCADb-01": "liver livertumor livercyst liverkyst tumor cyst portalvein venoussystem venacava artery bone skin "
    "spleen kidneys leftkidney rightkidney lungs leftlung rightlung gallbladder pancreas heart stomach bladder "
    "smallintestin colon surrenalgland leftsurrenalgland rightsurrenalgland rightsurretumor biliarysystem "
    "uterus livertumor01 livertumor1 livertumors livercyst1 portalvein1 metal metastasectomie stones".split(),
    "Pancreas-CT": ["pancreas"],
    "LiTS": ["liver", "tumor", "liver tumor"],
    "KiTS23": ["kidney", "tumor", "cyst", "masses", "kidney tumor", "renal_cyst"],
    "MSD Task03 Liver": ["liver", "cancer"],
    "MSD Task06 Lung": ["cancer"],
    "MSD Task07 Pancreas": ["pancreas", "cancer"],
    "MSD Task08 HepaticVessel": ["Vessel", "Tumour"],
    "MSD Task09 Spleen": ["spleen"],
    "MSD Task10 Colon": ["colon cancer primaries"],
}  # fmt: skip
